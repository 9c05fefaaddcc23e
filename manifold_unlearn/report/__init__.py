"""Results rendered: pictures and one HTML file."""
