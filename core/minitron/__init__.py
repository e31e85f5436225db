"""What every room of the toolkit may use.

The other rooms are the packages minitron_build, minitron_triton, minitron_client, minitron_gateway and minitron_cli.
"""
