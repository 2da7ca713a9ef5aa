"""Where task data comes from: shipped with the package, a local mirror, or the hub."""
