"""`python -m evmamba_hub.cli`, which launchers of several processes can start."""

from evmamba_hub.cli.main import main


if __name__ == "__main__":
    main()
