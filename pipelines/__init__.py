"""Every run of the project: imports everything, imported by nothing."""
