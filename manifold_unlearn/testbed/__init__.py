"""Models and facts to try methods on."""
