"""A model and texts in, arrays out."""
