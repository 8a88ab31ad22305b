"""What a site is lowered to, and the reference that every kernel is held to."""
