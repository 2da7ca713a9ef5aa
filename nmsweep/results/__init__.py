"""The results folder: names, records, claims, atomic writes, tables read back. No torch."""
