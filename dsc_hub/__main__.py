from dsc_hub.cli.main import main

if __name__ == "__main__":
    main()
