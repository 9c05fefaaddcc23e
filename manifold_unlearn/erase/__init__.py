"""Fitted maps that remove the forget part of activations."""
