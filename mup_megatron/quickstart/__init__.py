"""The whole path in small, all of it real: search on a proxy, transfer, comparison with standard parametrization."""
