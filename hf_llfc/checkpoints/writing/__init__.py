"""Writing a checkpoint, all of it or nothing: shards, journal, output folder."""
