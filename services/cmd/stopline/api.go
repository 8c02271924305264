package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/stopline-traffic/stopline/pkg/access"
	"github.com/stopline-traffic/stopline/pkg/identity"
	"github.com/stopline-traffic/stopline/services/gateway"
	"github.com/stopline-traffic/stopline/services/internal/agreed"
	"github.com/stopline-traffic/stopline/services/internal/district"
)

// apiOptions say where agencies ask; an empty address is nowhere.
type apiOptions struct{ listen, cert, key string }

func (o *apiOptions) flags(fs *flag.FlagSet) {
	fs.StringVar(&o.listen, "api", "127.0.0.1:0", "answer agencies by gRPC and REST on address `ADDR`; REST also on the page's. Empty:\nnot at all")
	fs.StringVar(&o.cert, "api-cert", "", "`FILE` with the PEM certificate for the API with TLS 1.3; needs --api-key. Without\nit tokens travel in the clear, so only on this machine")
	fs.StringVar(&o.key, "api-key", "", "`FILE` with its PEM key")
}

func (o *apiOptions) check() error {
	switch {
	case (o.cert == "") != (o.key == "") || o.listen == "" && o.cert != "":
		return usageError("demo: --api-cert and --api-key: must be given together, and with --api")
	case o.listen == "" || o.cert != "":
		return nil
	}
	host, _, err := net.SplitHostPort(o.listen)
	if err != nil {
		return usageError("demo: --api %s: %v", o.listen, err)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return usageError("demo: --api %s: can be reached from elsewhere, so it needs --api-cert and --api-key", o.listen)
	}
	return nil
}

// apiConfig is how the gateway serves agencies; nil where it does not. A district
// of before has no key for it.
func (l *local) apiConfig(o apiOptions) (*gateway.APIConfig, error) {
	if o.listen == "" {
		return nil, nil
	}
	key, err := l.district.Key(district.GatewayKey)
	if errors.Is(err, fs.ErrNotExist) {
		l.log.Warn("the district has no gateway key: it was made by an older version, and serves no API")
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	devices, err := l.devicesConfig()
	if err != nil {
		return nil, err
	}
	return &gateway.APIConfig{Listen: o.listen, CertFile: o.cert, KeyFile: o.key, Insecure: o.cert == "", Name: district.GatewayKey, Key: key, Policy: l.district.Policy, Devices: devices}, nil
}

// apiDoor says where agencies ask, and with what.
func (l *local) apiDoor(dir string) (lines, short string) {
	a := l.gateway.API()
	if a == nil {
		return "", ""
	}
	return fmt.Sprintf("  API          %s  gRPC and REST; methods at /docs/ of the page\n  credentials  stopline token --data %s --client operator-1\n", a.Addr(), dir), "  api " + a.Addr()
}

// drainAPI ends the API while everything that puts its readings on record is
// still there.
func (l *local) drainAPI() {
	if a := l.gateway.API(); a != nil {
		a.Drain()
	}
}

// clientToken makes a token with which a client asks the gateway.
func clientToken(d *district.District, client string, length time.Duration, once bool) (string, error) {
	if !slices.ContainsFunc(d.Genesis.Entries, func(e identity.Entry) bool { return e.Type == identity.TypeClient && e.ID == client }) {
		var known []string
		for _, e := range d.Genesis.Entries {
			if e.Type == identity.TypeClient {
				known = append(known, e.ID)
			}
		}
		return "", fmt.Errorf("client %q is not in the district's first registry; there are %s", client, strings.Join(known, ", "))
	}
	key, err := d.Key(district.ClientKey(client))
	if err != nil {
		return "", err
	}
	id := ""
	if once {
		var b [16]byte
		if _, err := rand.Read(b[:]); err != nil {
			return "", err
		}
		id = hex.EncodeToString(b[:])
	}
	return gateway.NewToken(d.Genesis.District, client, key, time.Now(), length, id)
}

// printClientToken is stopline token --client.
func printClientToken(s streams, data, client string, length time.Duration, once, asJSON bool) error {
	if length == 0 {
		length = gateway.MaxTokenLife
	}
	if length < time.Second || length > gateway.MaxTokenLife {
		return usageError("token: --for %v: must be 1s to %v for a client", length, gateway.MaxTokenLife)
	}
	d, err := district.Load(data)
	if err != nil {
		return err
	}
	token, err := clientToken(d, client, length, once)
	if err != nil {
		return err
	}
	if !asJSON {
		_, err = fmt.Fprintln(s.out, token)
		return err
	}
	return printJSON(s.out, map[string]any{"district": d.Genesis.District, "client": client, "token": token, "audience": gateway.Audience(d.Genesis.District),
		"expires": time.Now().Add(length).UTC().Truncate(time.Second)})
}

var policyCommand = command{
	name:     "policy",
	synopsis: "stopline policy explain --client ID --method METHOD [--object OBJECT]... [--purpose CODE] [--case NUMBER]\n                   [--legal-basis CODE] [--approved-by ID] [--at TIME] [--data DIR | --url URL] [--json]",
	summary:  "say which rule lets a client ask for something, or does not",
	manual: `Decides a call as the gateway would, by the access policy and the clients that the
registry holds, and says which rule decided, without making the call. Nothing is
put on record.

METHOD is a method of the API, such as GetBundle, or its full name. OBJECT is what
the call is about: TYPE:ID, and what is known of it, joined by commas, such as
junction:h0101 or record:17,kind=command,agency=police. Types are district,
junction, record, request, override, device, entry, claim, proposal and access.
Without any it is the district. --client public is somebody who has not said who
they are.

The registry is that of the demo at URL, or, with --data, the one that the
gateway of a data folder knew last. The exit status is 0 where the call would be
granted, and 1 where it would be denied.`,
	flags: func(fs *flag.FlagSet) func(context.Context, []string, streams) error {
		var c access.Call
		data := fs.String("data", "", "data folder `DIR`, whose registry to take")
		url := fs.String("url", "http://127.0.0.1:8080", "address `URL` of the running demo")
		client := fs.String("client", "", "who asks: `ID` of a client in the registry, or public")
		method := fs.String("method", "", "what is asked: name of a `METHOD` of the API")
		fs.StringVar(&c.Purpose, "purpose", "", "purpose's `CODE`")
		fs.StringVar(&c.Case, "case", "", "case `NUMBER`")
		fs.StringVar(&c.LegalBasis, "legal-basis", "", "legal basis's `CODE`")
		fs.StringVar(&c.ApprovedBy, "approved-by", "", "second person's `ID`, for exports")
		fs.Func("object", "what the call is about, `OBJECT`; may be given several times", func(s string) error {
			o, err := parseObject(s)
			c.Objects = append(c.Objects, o)
			return err
		})
		at := fs.String("at", "", "`TIME` of the call, RFC 3339; empty: now")
		asJSON := fs.Bool("json", false, "print one JSON object")
		return func(ctx context.Context, args []string, s streams) error {
			if len(args) != 1 || args[0] != "explain" || *client == "" || *method == "" {
				return usageError("policy explain: --client and --method are needed, and no other arguments")
			}
			var err error
			if c.Method, err = fullMethod(*method); err != nil {
				return usageError("policy explain: --method: %v", err)
			}
			c.Time = time.Now()
			if *at != "" {
				if c.Time, err = time.Parse(time.RFC3339, *at); err != nil {
					return usageError("policy explain: --at: %v", err)
				}
			}
			var known accessRules
			if *data != "" {
				known, err = rulesOfFolder(*data)
			} else {
				known, err = rulesOfDemo(ctx, strings.TrimSuffix(*url, "/"))
			}
			if err != nil {
				return err
			}
			if *client != "public" {
				cl, ok := known.clients[*client]
				if !ok {
					return fmt.Errorf("client %q is not in force in the registry; there are %s", *client, strings.Join(slices.Sorted(mapsKeys(known.clients)), ", "))
				}
				c.Principal = access.Principal{ID: *client, Client: cl}
			}
			d := known.engine.Decide(c)
			verdict := "denied"
			if d.Granted {
				verdict = "granted"
			}
			if *asJSON {
				err = printJSON(s.out, map[string]any{"granted": d.Granted, "policies": d.Policies, "reason": d.Reason, "method": c.Method,
					"client": *client, "roles": c.Principal.Client.Roles, "agency": c.Principal.Client.Agency, "policy_version": known.engine.Version()})
			} else {
				_, err = fmt.Fprintf(s.out, "%s: %s\n  %s of %s with roles %s\n  %s for purpose %s, by access policy %s\n", verdict, clean(d.Reason),
					*client, cmp.Or(c.Principal.Client.Agency, "no agency"), cmp.Or(strings.Join(c.Principal.Client.Roles, ", "), "none"),
					strings.TrimPrefix(c.Method, "/"), cmp.Or(clean(c.Purpose), "none"), known.engine.Version())
			}
			if err == nil && !d.Granted {
				return exitError{code: exitFailed}
			}
			return err
		}
	},
}

func mapsKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// fullMethod finds a method by its name, or its full name.
func fullMethod(name string) (string, error) {
	if _, ok := access.Methods["/"+strings.TrimPrefix(name, "/")]; ok {
		return "/" + strings.TrimPrefix(name, "/"), nil
	}
	var known []string
	for m := range access.Methods {
		if path.Base(m) == name {
			return m, nil
		}
		known = append(known, path.Base(m))
	}
	slices.Sort(known)
	return "", fmt.Errorf("%.60q is no method of the API; there are %s", name, strings.Join(known, ", "))
}

// objectTypes are the types of objects, by how people write them.
var objectTypes = map[string]string{"district": "District", "junction": "Junction", "record": "Record", "request": "Request", "override": "Override",
	"device": "Device", "entry": "Entry", "claim": "Claim", "proposal": "Proposal", "access": "Access"}

func parseObject(s string) (access.Object, error) {
	what, rest, more := strings.Cut(s, ",")
	typ, id, ok := strings.Cut(what, ":")
	o := access.Object{Type: objectTypes[strings.ToLower(typ)], ID: id}
	if !ok || o.Type == "" || id == "" {
		return o, fmt.Errorf("must be TYPE:ID, with a type such as junction or record")
	}
	for more {
		var part string
		part, rest, more = strings.Cut(rest, ",")
		name, value, _ := strings.Cut(part, "=")
		switch name {
		case "agency":
			o.Agency = value
		case "kind":
			o.Kind = value
		case "junction":
			o.Junction = value
		default:
			return o, fmt.Errorf("%.40q: must be agency=, kind= or junction=", part)
		}
	}
	if o.Type == "Junction" && o.Junction == "" {
		o.Junction = id
	}
	return o, nil
}

// accessRules are by what the gateway decides.
type accessRules struct {
	engine  *access.Engine
	clients map[string]identity.Client
}

func rulesOfFolder(dir string) (accessRules, error) {
	d, err := district.Load(dir)
	if err != nil {
		return accessRules{}, err
	}
	s, err := agreed.Open(filepath.Join(dir, "gateway.place"), &d.Genesis)
	if err != nil {
		return accessRules{}, err
	}
	reg := s.Registry()
	p, ok := reg.Access()
	if !ok {
		return accessRules{}, fmt.Errorf("%s: the registry holds no access policy", dir)
	}
	e, err := access.Compile(reg.District(), p)
	return accessRules{e, reg.Clients()}, err
}

// rulesOfDemo reads them from a running demo.
func rulesOfDemo(ctx context.Context, url string) (accessRules, error) {
	o := registryOptions{url: url}
	v, err := o.view(ctx, "")
	if err != nil {
		return accessRules{}, err
	}
	r := accessRules{clients: map[string]identity.Client{}}
	agencies := map[string]bool{}
	for _, e := range v.Entries {
		agencies[e.ID] = agencies[e.ID] || e.Type == identity.TypeAgency && e.Status == identity.Active
	}
	for _, e := range v.Entries {
		if e.Status != identity.Active {
			continue
		}
		switch e.Type {
		case identity.TypeAccess:
			var p identity.AccessPolicy
			if err := json.Unmarshal(e.Body, &p); err != nil {
				return r, fmt.Errorf("access policy: %w", err)
			}
			if r.engine, err = access.Compile(v.District, p); err != nil {
				return r, err
			}
		case identity.TypeClient:
			var c identity.Client
			if err := json.Unmarshal(e.Body, &c); err != nil {
				return r, fmt.Errorf("client %s: %w", e.ID, err)
			}
			if agencies[c.Agency] {
				r.clients[e.ID] = c
			}
		}
	}
	if r.engine == nil {
		return r, fmt.Errorf("%s: the registry holds no access policy", url)
	}
	return r, nil
}
