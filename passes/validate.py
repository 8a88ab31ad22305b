"""Translation validation (stub for the moment)."""
def validate(view, found, inputs):
    return found
