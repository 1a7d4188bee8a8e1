"""The guests' networks on this box: bridges, taps, neighbours, routes, firewall, resolvers."""
