"""Publishing releases: keys, a repository that any static web server can serve, bundles."""
