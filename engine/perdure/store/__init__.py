"""The durable side: tables, connections, the log, its projection, and who follows it."""
