// Command gotemplate renders chats with a Go text/template the way Ollama renders a Modelfile TEMPLATE.
//
// It reads {"template", "now", "chats": [{"messages", "tools"}]} on stdin and writes {"prompts": [{"text"} or {"error"}]}
// on stdout. It needs the standard library only, so it builds without a module proxy. What Ollama does beside
// rendering (cutting old turns to fit the context, images, built-in renderers) is not done here.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

type request struct {
	Template string    `json:"template"`
	Now      time.Time `json:"now"`
	Chats    []struct {
		Messages []message `json:"messages"`
		Tools    []tool    `json:"tools"`
	} `json:"chats"`
}

type prompt struct {
	Text  string `json:"text"`
	Error string `json:"error,omitempty"`
}

func main() {
	var in request
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		fmt.Fprintln(os.Stderr, "reading the request:", err)
		os.Exit(2)
	}
	if in.Now.IsZero() {
		in.Now = time.Now()
	}
	t, err := parseTemplate(in.Template, in.Now)
	out := make([]prompt, len(in.Chats))
	for i, chat := range in.Chats {
		if err != nil {
			out[i].Error = "template error: " + err.Error()
		} else if text, err := render(t, chat.Messages, chat.Tools); err != nil {
			out[i].Error = err.Error()
		} else {
			out[i].Text = text
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"prompts": out}); err != nil {
		os.Exit(1)
	}
}

// parseTemplate parses with Ollama's four functions; a template that mentions neither .Messages nor .Response gets
// .Response at its end.
func parseTemplate(source string, now time.Time) (*template.Template, error) {
	date := func(days int) func(...string) string {
		return func(...string) string { return now.AddDate(0, 0, days).Format("2006-01-02") }
	}
	t, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{
		"json":             func(v any) string { return marshal(v) },
		"currentDate":      date(0),
		"yesterdayDate":    date(-1),
		"toTypeScriptType": typeScript,
	}).Parse(source)
	if err != nil {
		return nil, err
	}
	if !mentions(t, "Messages") && !mentions(t, "Response") {
		return t.Parse(source + "{{ .Response }}")
	}
	return t, nil
}

// render executes the template once over all turns, or - for a template without .Messages - once per exchange.
func render(t *template.Template, messages []message, tools []tool) (string, error) {
	system, turns := collate(messages)
	if !mentions(t, "Messages") {
		return renderExchanges(t, turns)
	}
	var b strings.Builder
	err := t.Execute(&b, map[string]any{
		"System": system, "Messages": turns, "Tools": toolList(tools), "Response": "",
		"Think": false, "ThinkLevel": "", "IsThinkSet": false,
	})
	return b.String(), err
}

// collate merges neighbouring turns of one role, tool results excepted, and gathers every system text.
func collate(messages []message) (string, []*message) {
	var system []string
	var turns []*message
	for i := range messages {
		m := messages[i]
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(turns); n > 0 && turns[n-1].Role == m.Role && m.Role != "tool" {
			turns[n-1].Content += "\n\n" + m.Content
			continue
		}
		turns = append(turns, &m)
	}
	return strings.Join(system, "\n\n"), turns
}

// renderExchanges is the older style: .System, .Prompt and .Response, one execution per exchange, the last one cut
// after .Response.
func renderExchanges(t *template.Template, turns []*message) (string, error) {
	var b strings.Builder
	data := func(system, prompt, response string) map[string]any {
		return map[string]any{
			"System": system, "Prompt": prompt, "Response": response,
			"Think": false, "ThinkLevel": "", "IsThinkSet": false,
		}
	}
	var system, asked, answered string
	for _, m := range turns {
		ends := m.Role == "system" && asked+answered != "" || m.Role == "user" && answered != ""
		if ends {
			if err := t.Execute(&b, data(system, asked, answered)); err != nil {
				return "", err
			}
			system, asked, answered = "", "", ""
		}
		switch m.Role {
		case "system":
			system = m.Content
		case "user":
			asked = m.Content
		case "assistant":
			answered = m.Content
		}
	}
	clone, err := t.Clone()
	if err != nil {
		return "", err
	}
	tree := t.Tree.Copy()
	cutAfterResponse(tree.Root)
	last, err := clone.AddParseTree(t.Name(), tree)
	if err != nil {
		return "", err
	}
	err = last.Execute(&b, data(system, asked, answered))
	return b.String(), err
}

// cutAfterResponse drops everything after the first .Response action; true once it was found.
func cutAfterResponse(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for i, node := range list.Nodes {
		if action, ok := node.(*parse.ActionNode); ok && slices.Contains(fields(action), "Response") {
			list.Nodes = list.Nodes[:i+1]
			return true
		}
		if branch := branchOf(node); branch != nil && (cutAfterResponse(branch.List) || cutAfterResponse(branch.ElseList)) {
			list.Nodes = list.Nodes[:i+1]
			return true
		}
	}
	return false
}

func branchOf(node parse.Node) *parse.BranchNode {
	switch n := node.(type) {
	case *parse.IfNode:
		return &n.BranchNode
	case *parse.RangeNode:
		return &n.BranchNode
	case *parse.WithNode:
		return &n.BranchNode
	}
	return nil
}

// mentions tells whether the template or one it defines uses a field name, in any letter case.
func mentions(t *template.Template, name string) bool {
	for _, part := range t.Templates() {
		for _, found := range fields(part.Root) {
			if strings.EqualFold(found, name) {
				return true
			}
		}
	}
	return false
}

// fields lists the field names used below a node.
func fields(node parse.Node) []string {
	var names []string
	switch n := node.(type) {
	case *parse.ListNode:
		if n != nil {
			for _, child := range n.Nodes {
				names = append(names, fields(child)...)
			}
		}
	case *parse.ActionNode:
		names = fields(n.Pipe)
	case *parse.TemplateNode:
		if n.Pipe != nil {
			names = fields(n.Pipe)
		}
	case *parse.PipeNode:
		for _, command := range n.Cmds {
			for _, argument := range command.Args {
				names = append(names, fields(argument)...)
			}
		}
	case *parse.FieldNode:
		names = n.Ident
	case *parse.VariableNode:
		names = n.Ident
	case *parse.ChainNode:
		names = append(fields(n.Node), n.Field...)
	}
	if branch := branchOf(node); branch != nil {
		names = append(fields(branch.Pipe), append(fields(branch.List), fields(branch.ElseList)...)...)
	}
	return names
}
