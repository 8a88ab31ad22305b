"""What runs beside a compiled graph: checks of what it was compiled under."""
