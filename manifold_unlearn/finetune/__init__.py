"""Gradient unlearners: losses, one loop, and what protects the retain set."""
