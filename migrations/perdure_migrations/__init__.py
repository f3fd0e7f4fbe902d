"""The database's schema, step by step; run by `perdure db upgrade` or on first use."""
