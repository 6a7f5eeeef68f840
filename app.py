"""Chat with a checkpoint about an image, in a browser; `python app.py --help` says more. A Space runs this, too."""

if __name__ == "__main__":
    from webapp.start import main

    main()
