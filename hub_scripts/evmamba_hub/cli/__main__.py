"""`python -m evmamba_hub.cli`, for launchers of several processes such as `accelerate launch`."""

from evmamba_hub.cli.main import main


if __name__ == "__main__":
    main()
