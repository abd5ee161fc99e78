"""Other ways to make the same weights smaller, which RPS is measured against."""
