"""Settings of a study: the TOML file and its schema."""
