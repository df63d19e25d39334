"""Run one migration in one of several scenarios, or watch a third party's migration."""
