"""What every room may use: records, masked reductions, sharding rules, answers."""
