"""Mappings: names, shapes and a seed become one shared matrix per target."""
