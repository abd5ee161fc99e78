"""Run PEFT's own test suite on RPSConfig, in both modes, with the tool of the shared folder; see `make conformance`.

    python tests/conformance.py ../shared/tools

The tool takes the tests from the source distribution of the installed PEFT; nothing of them is kept here. A failure
that the tool's list of known ones does not hold, or fewer tests passed than before, is an error.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

AT_LEAST = {"delta": 745, "replace": 646}  # passed, with peft 0.21.2


def main() -> int:
    tools = Path(sys.argv[1])
    if not (tools / "peft_conformance.py").is_file():
        print(f"no {tools / 'peft_conformance.py'} here: PEFT's own tests are not run", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    failed = []
    for mode, least in AT_LEAST.items():
        with tempfile.TemporaryDirectory() as folder:
            outcomes = Path(folder) / "outcomes.json"
            code = subprocess.run(
                [sys.executable, str(tools / "peft_conformance.py"), "hf_rps:RPSConfig",
                 json.dumps({"ratio": 0.5, "mode": mode}),
                 "--known-failures", str(tools / f"peft_known_failures_{mode}.txt"),
                 "--work", str(Path("build/conformance").resolve()), "--json", str(outcomes), "-n", "2"],
                stdout=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            counts = Counter(json.loads(outcomes.read_text()).values()) if outcomes.exists() else Counter()
        print(f"PEFT's tests, mode {mode!r}: {dict(counts)}")
        if code.returncode or counts["passed"] < least:
            print(code.stdout[-4000:], f"expected no unexpected failure and at least {least} passed", sep="\n")
            failed.append(mode)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
