"""From scores to a comparison: aggregate, render."""
