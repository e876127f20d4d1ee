"""The rehearsal room: the same deciders and hall in a seeded world with a bad network and worse disks."""
