"""The noisy-recall probe: small sequence models around the cores, many seeds at once."""
