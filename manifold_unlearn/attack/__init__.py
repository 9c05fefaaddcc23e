"""Attacks that bring back what a model was made to forget, each with its compute."""
