"""`maisi studio`: a page and an HTTP API in which a person, or a program, designs a patient and gets a CT."""
