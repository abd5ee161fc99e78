"""PeftType.RPS: PEFT knows its methods by members of an enumeration, which has no public way to grow."""

from __future__ import annotations

from enum import EnumMeta

from peft import PeftType


def extend(enumeration: EnumMeta, name: str) -> None:
    """Add the member ``name`` with itself as its value to an enumeration of strings, once.

    A plain string in its place would serve PEFT, but not transformers, which reads ``peft_type.value``.
    """
    if name in enumeration.__members__:
        return
    member = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(enumeration)
    member.__objclass__ = enumeration
    type.__setattr__(enumeration, name, member)  # Enum's own __setattr__ refuses
    enumeration._member_map_[name] = member
    enumeration._member_names_.append(name)
    enumeration._value2member_map_[name] = member


extend(PeftType, "RPS")
RPS = PeftType("RPS")
