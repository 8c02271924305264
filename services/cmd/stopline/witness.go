package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	neturl "net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"gopkg.in/yaml.v3"

	"github.com/stopline-traffic/stopline/pkg/ledger"
	"github.com/stopline-traffic/stopline/services/internal/district"
	"github.com/stopline-traffic/stopline/services/internal/run"
	"github.com/stopline-traffic/stopline/services/witness"
)

var witnessCommand = command{
	name:     "witness",
	synopsis: "stopline witness --config FILE [--check]\nstopline witness --write-config DIR --name NAME --log VKEY [--log VKEY...] [--listen ADDR]",
	summary:  "cosign other districts' checkpoints",
	manual: `Runs a witness, C2SP tlog-witness: it cosigns a checkpoint of a log that it knows
only after a proof that the log has just grown since the one before. What it has
cosigned is on disk before it answers; kill -9 at any moment does no harm. A second
process on the same data folder is refused. Never put back a copy of the folder,
and never go on with the key after losing it.

The configuration is YAML; paths are relative to the file:

    name: fjord.example/witness     # of the key, as it stands in policies
    key: witness.key                # 64 hex digits of the seed; signs nothing else
    data: data                      # folder of the witness' own
    listen: 127.0.0.1:7380
    logs:                           # nothing else is ever cosigned
      - origin: stopline.example/harbour
        keys: [stopline.example/harbour+0123abcd+AQ...]
    log_level: info                 # optional: debug, info, warn or error

POST /add-checkpoint is for logs, GET / says which logs are known, how far, and
what was counted. Put TLS in front of it where it leaves the machine.

--write-config makes a key, a configuration and the data folder below DIR, and
prints the line that a district's policy needs.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		config := fs.String("config", "", "configuration `FILE`")
		check := fs.Bool("check", false, "check the configuration and the key; start nothing")
		write := fs.String("write-config", "", "make a witness below `DIR`, which must not exist")
		name := fs.String("name", "", "with --write-config: `NAME` of the key")
		addr := fs.String("listen", "127.0.0.1:7380", "with --write-config: `ADDRESS` to listen on")
		var logs []string
		fs.Func("log", "with --write-config: a log to cosign, by its verifier key `VKEY`", func(s string) error {
			logs = append(logs, s)
			return nil
		})
		return func(ctx context.Context, args []string, s streams) error {
			switch {
			case len(args) > 0:
				return usageError("witness: takes no arguments, got %q", args)
			case (*config == "") == (*write == ""):
				return usageError("witness: either --config or --write-config is needed")
			case *write == "" && (*name != "" || len(logs) > 0):
				return usageError("witness: --name, --log: only with --write-config")
			case *write != "" && (*name == "" || len(logs) == 0 || *check):
				return usageError("witness: --write-config needs --name and --log, and no --check")
			case *write != "":
				return writeWitness(*write, *name, *addr, logs, s.out)
			}
			w, err := loadWitness(*config)
			if err != nil {
				return err
			}
			if *check {
				_, err := fmt.Fprintf(s.out, "OK: witness %s of %d logs\n", w.Name, len(w.Logs))
				return err
			}
			return w.run(ctx, s.err)
		}
	},
}

// witnessConfig is the form of the configuration file.
type witnessConfig struct {
	Name     string       `yaml:"name"`
	Key      string       `yaml:"key"`
	Data     string       `yaml:"data"`
	Listen   string       `yaml:"listen"`
	Logs     []witnessLog `yaml:"logs"`
	LogLevel string       `yaml:"log_level,omitempty"`
}

type witnessLog struct {
	Origin string   `yaml:"origin"`
	Keys   []string `yaml:"keys"`
}

// witnessFile is a configuration that has been checked, with what it names.
type witnessFile struct {
	witnessConfig
	config witness.Config
	level  slog.Level
}

// loadWitness reads a configuration and its key, and tells everything that is
// wrong at once.
func loadWitness(file string) (*witnessFile, error) {
	raw, err := readAtMost(file, maxValidatorConfig)
	if err != nil {
		return nil, err
	}
	w := &witnessFile{}
	p := &problems{file: file, lines: map[string]int{}}
	if err := decodeYAML(raw, &w.witnessConfig, p); err != nil {
		return nil, err
	}
	rel := func(path string) string {
		if path == "" || filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(filepath.Dir(file), path)
	}
	for field, value := range map[string]string{"name": w.Name, "key": w.Key, "data": w.Data, "listen": w.Listen} {
		if value == "" {
			p.add(field, "must be given")
		}
	}
	w.config = witness.Config{Name: w.Name, Dir: rel(w.Data)}
	if w.Key != "" {
		if w.config.Key, err = district.ReadKey(rel(w.Key)); err != nil {
			p.add("key", "%w", err)
		}
	}
	if w.Listen != "" {
		if _, _, err := net.SplitHostPort(w.Listen); err != nil {
			p.add("listen", "%w", err)
		}
	}
	for _, l := range w.Logs {
		w.config.Logs = append(w.config.Logs, witness.Log{Origin: l.Origin, Keys: l.Keys})
	}
	if w.LogLevel == "" {
		w.LogLevel = "info"
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, w.LogLevel) {
		p.add("log_level", "%q, must be debug, info, warn or error", w.LogLevel)
	} else if err := w.level.UnmarshalText([]byte(w.LogLevel)); err != nil {
		p.add("log_level", "%w", err)
	}
	if len(p.errs) == 0 {
		if err := w.config.Validate(); err != nil {
			p.errs = append(p.errs, fmt.Errorf("%s: %w", file, err))
		}
	}
	return w, errors.Join(p.errs...)
}

// run serves until ctx ends.
func (w *witnessFile) run(ctx context.Context, errs io.Writer) (err error) {
	log := slog.New(slog.NewTextHandler(errs, &slog.HandlerOptions{Level: w.level})).With("service", "witness")
	w.config.Logger = log
	x, err := witness.New(w.config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, x.Close()) }()
	n, err := net.Listen("tcp", w.Listen)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	log.Info("witness", "url", fmt.Sprintf("http://%s/", n.Addr()), "key", x.Key())
	// A request is some kilobytes: whoever takes longer is not serious.
	server := &http.Server{Handler: x.Handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 20 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	err = run.All(ctx, run.Actor{Name: "witness", Run: func(ctx context.Context) error { return serveHTTP(ctx, server, n) }})
	if ctx.Err() != nil && (err == nil || errors.Is(err, ctx.Err())) {
		return nil // asked to end
	}
	return err
}

// writeWitness makes a key, a configuration and a data folder.
func writeWitness(dir, name, addr string, vkeys []string, out io.Writer) error {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	c := witnessConfig{Name: name, Key: "witness.key", Data: "data", Listen: addr, LogLevel: "info"}
	check := witness.Config{Name: name, Key: key, Dir: filepath.Join(dir, "data")}
	for _, k := range vkeys {
		v, err := note.NewVerifier(k)
		if err != nil {
			return usageError("witness: --log %.100q: %v", k, err)
		}
		c.Logs = append(c.Logs, witnessLog{Origin: v.Name(), Keys: []string{k}})
		check.Logs = append(check.Logs, witness.Log{Origin: v.Name(), Keys: []string{k}})
	}
	if err := check.Validate(); err != nil {
		return usageError("%v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := district.WriteKey(filepath.Join(dir, c.Key), key); err != nil {
		return err
	}
	if err := witness.Create(check.Dir, name, key); err != nil {
		return err
	}
	doc, err := yaml.Marshal(c)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "witness.yaml")
	if err := district.WriteFile(file, doc, 0o644); err != nil {
		return err
	}
	x, err := witness.New(check)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "stopline witness --config %s\nwitness NAME %s http://%s/\n", file, x.Key(), addr)
	return errors.Join(err, x.Close())
}

// parseWitness decodes a verifier key and a URL, joined by @.
func parseWitness(s string) (ledger.Witness, error) {
	vkey, url, ok := strings.Cut(s, "@")
	if u, err := neturl.Parse(url); !ok || err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return ledger.Witness{}, errors.New("must be a verifier key and a URL, joined by @")
	}
	c, err := ledger.ParseCosigner(vkey)
	if err != nil {
		return ledger.Witness{}, err
	}
	return ledger.Witness{Name: c.Name(), Cosigner: c, URL: url}, nil
}
