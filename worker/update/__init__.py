"""Getting releases onto the box: whom to trust, what to fetch, and fetching it."""
