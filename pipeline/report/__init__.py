"""report.json, and everything drawn from it: the page, its charts, JUnit, the certificate."""
