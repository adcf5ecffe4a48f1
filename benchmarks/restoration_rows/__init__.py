"""What `quality.py` compares: rows, the images that they are measured on, and tables."""
