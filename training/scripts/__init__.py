"""Programs of their own: set-up, and the documented serve commands."""
