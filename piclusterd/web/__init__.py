"""The doors to the street: the OpenAI API, the status page, health, metrics, webhooks. Reads by asking the node."""
