"""Other ways to make the same weights smaller, which RPS is measured against."""


class BudgetError(ValueError):
    """A method has no form that stores as little as was asked for; the message says what the least is."""
