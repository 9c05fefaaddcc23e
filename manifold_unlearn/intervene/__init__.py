"""Fitted maps put into a model, as hooks or in its weights."""
