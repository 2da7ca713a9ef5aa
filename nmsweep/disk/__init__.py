"""What several processes and a power cut may do to a file, answered: whole writes, owners, claims, interruption. Stands on `errors` alone."""
