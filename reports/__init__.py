"""What evaluate.py shows of what is finished: tables, comparisons, figures, a page."""
