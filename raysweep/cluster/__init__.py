"""A study on a Ray cluster from afar: what travels, the job that runs it, and how far it is."""
