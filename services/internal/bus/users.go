package bus

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nkeys"

	"github.com/stopline-traffic/stopline/pkg/topic"
)

// User is one NATS user of a district.
type User struct {
	Name string
	// NKey is the user's public nkey, U….
	NKey        string
	Permissions topic.Permissions
}

// NewNKey makes the key of a NATS user: its public half, and what its seed file
// holds.
func NewNKey() (public string, seed []byte, err error) {
	k, err := nkeys.CreateUser()
	if err != nil {
		return "", nil, err
	}
	defer k.Wipe()
	if public, err = k.PublicKey(); err != nil {
		return "", nil, err
	}
	if seed, err = k.Seed(); err != nil {
		return "", nil, err
	}
	return public, append(bytes.Clone(seed), '\n'), nil // k's own is wiped
}

// ServerConfig returns a configuration file for nats-server: JetStream in dir,
// which syncs always, messages as large as a change of leaders takes, and the
// users with their permissions; nobody else is let in.
func ServerConfig(listen, dir string, users []User) ([]byte, error) {
	var b strings.Builder
	fmt.Fprintf(&b, `# Every stored message is on disk before it is acknowledged: a receipt rests on it.
listen: %q
max_payload: %d
max_pending: %d
jetstream {
  store_dir: %q
  sync_interval: always
}
authorization {
  users = [
`, listen, topic.MaxPayload, 8*topic.MaxPayload, dir)
	seen := map[string]bool{}
	var errs []error
	for _, u := range users {
		if !nkeys.IsValidPublicUserKey(u.NKey) || seen[u.NKey] {
			errs = append(errs, fmt.Errorf("bus: user %s: NKey: %q, must be a public user key of its own", u.Name, u.NKey))
		}
		seen[u.NKey] = true
		fmt.Fprintf(&b, "    # %s\n    { nkey: %s, permissions: {\n      publish: { allow: [%s] }\n      subscribe: { allow: [%s] }\n",
			headerLine(u.Name), u.NKey, quoted(u.Permissions.Publish), quoted(u.Permissions.Subscribe))
		if n := u.Permissions.Responses; n > 0 {
			fmt.Fprintf(&b, "      allow_responses: { max: %d, expires: %q }\n", n, u.Permissions.ResponseWait)
		}
		b.WriteString("    } }\n")
	}
	b.WriteString("  ]\n}\n")
	return []byte(b.String()), errors.Join(errs...)
}

// quoted writes subjects as a list. A user without any must not be allowed all.
func quoted(subjects []string) string {
	if len(subjects) == 0 {
		return `"none"`
	}
	q := make([]string, len(subjects))
	for i, s := range subjects {
		q[i] = fmt.Sprintf("%q", s)
	}
	return strings.Join(q, ", ")
}
