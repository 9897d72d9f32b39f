raise ImportError("only tests that look at a report have it drawn")
