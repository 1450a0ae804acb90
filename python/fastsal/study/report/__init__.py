"""Pictures and pages about what was done; needs the `report` extra."""
