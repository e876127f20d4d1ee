"""What to do about an event: intake* makes it durable, run* walks its steps, triage* says what they are."""
