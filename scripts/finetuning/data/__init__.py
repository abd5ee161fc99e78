"""From a dataset's name, its files or its folder to rows that a model reads."""
