"""A small CNN on handwritten digits, rounded to 3 bits. Run: `python -m distributed_adaround.examples.digits`."""
