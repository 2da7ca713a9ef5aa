"""Scores, contrasts and checks that a report shows, computed from records."""
