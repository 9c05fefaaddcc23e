"""What to erase with, and where: from a model and items to an edit or an edited model."""
