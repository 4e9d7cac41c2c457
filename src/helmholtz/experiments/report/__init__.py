"""One page of all results: tables whose every number names the place in a JSON file that it was read from."""
